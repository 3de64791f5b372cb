-- Makes an empty pipe. KEYS: the stream, what is known of it. Returns whether it did not exist.

-- Fails for a key of another type.
redis.call('XLEN', KEYS[1])
if redis.call('EXISTS', KEYS[1]) == 1 then
    return 0
end
local _, _, _, _, producers, last = counted(redis.call('HGET', KEYS[2], '.count'))
make(KEYS[1], KEYS[2], producers, last)
return 1
