-- Makes an empty pipe. KEYS: the stream, what is known of it. Returns whether it did not exist.

-- Fails for a key of another type.
redis.call('XLEN', KEYS[1])
if redis.call('EXISTS', KEYS[1]) == 1 then
    return 0
end
make(KEYS[1], KEYS[2], redis.call('HGET', KEYS[2], '.last'))
return 1
