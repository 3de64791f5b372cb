-- Makes an empty pipe. KEYS: the stream, `meta`. Returns whether it did not exist.

redis.call('XLEN', KEYS[1])
if redis.call('EXISTS', KEYS[1]) == 1 then
    return 0
end
make(KEYS[1], KEYS[2], counted(KEYS[2])[2])
return 1
