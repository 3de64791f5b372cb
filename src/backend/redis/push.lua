-- Appends messages, unless this push was stored before. KEYS: the stream, `meta`, `pushes`, `pushes-old`.
-- ARGV: the producer, its number in 20 digits, the sum of the messages' bytes, the longest one's, the messages.
-- Returns the id of the push's last message.
--
-- Each producer's last push is remembered in `pushes`; once that has PRODUCERS of them, it becomes
-- `pushes-old`. Together they know the last 65,536 producers at least.

local PRODUCERS = 65536

local stream, meta, pushes, old = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
-- First of all, as it fails for a key of another type.
local length = redis.call('XLEN', stream)
local known = redis.call('HGET', pushes, ARGV[1]) or redis.call('HGET', old, ARGV[1])
if known and known:sub(1, 20) >= ARGV[2] then
    return known:sub(21)
end

local before = counted(meta)
local bytes, largest = 0, 0
if length > 0 then
    -- Not counted here: that is not for a push to wait for.
    if before[1] and tonumber(before[1]) == length
        and #redis.call('XRANGE', stream, '(' .. before[2], '+', 'COUNT', 1) == 0 then
        bytes, largest = tonumber(before[3]), tonumber(before[4])
    else
        bytes, largest = -1, -1
    end
elseif redis.call('EXISTS', stream) == 0 then
    make(stream, meta, before[2])
end

local last
for at = 5, #ARGV do
    last = redis.call('XADD', stream, '*', 'data', ARGV[at])
end
if bytes >= 0 then
    redis.call('HSET', meta, 'length', length + #ARGV - 4, 'last', last,
        'bytes', string.format('%.0f', bytes + tonumber(ARGV[3])),
        'largest', math.max(largest, tonumber(ARGV[4])))
else
    redis.call('HSET', meta, 'length', -1, 'last', last)
end
if redis.call('HSET', pushes, ARGV[1], ARGV[2] .. last) == 1
    and redis.call('HLEN', pushes) >= PRODUCERS then
    redis.call('UNLINK', old)
    redis.call('RENAME', pushes, old)
end
return last
