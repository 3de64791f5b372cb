-- Appends messages, unless this push was stored before. KEYS: the stream, what is known of it, earlier producers.
-- ARGV: the producer, its number in 20 digits, the sum of the messages' bytes, the longest one's, the messages.
-- Returns the id of the push's last message.
--
-- The last push of each producer is remembered; once there are PRODUCERS of them, they become the earlier ones.
-- Together those are the last 65,536 producers at least.

local PRODUCERS = 65536

local stream, known, earlier, producer = KEYS[1], KEYS[2], KEYS[3], ARGV[1]
local before = redis.call('HMGET', known, producer,
    '.added', '.length', '.bytes', '.largest', '.last', '.producers', '.earlier')
local stored = before[1] or before[8] and redis.call('HGET', earlier, producer)
if stored and stored:sub(1, 20) >= ARGV[2] then
    return stored:sub(21)
end

local call, count = redis.call, #ARGV - 4
local last = call('XADD', stream, 'NOMKSTREAM', '*', 'data', ARGV[5])
if not last then
    make(stream, known, before[6])
    before[2], before[3], before[4], before[5] = 0, 0, 0, 0
    last = call('XADD', stream, '*', 'data', ARGV[5])
end
for at = 6, #ARGV do
    last = call('XADD', stream, '*', 'data', ARGV[at])
end

local producers = tonumber(before[7] or 0)
if not before[1] then
    producers = producers + 1
    if producers > PRODUCERS then
        -- What is known goes along, and comes back.
        local kept = {}
        for at, field in ipairs(redis.call('HMGET', known, '.floor', '.made', '.changed')) do
            kept[at] = field
        end
        redis.call('UNLINK', earlier)
        redis.call('RENAME', known, earlier)
        redis.call('HSET', known, '.floor', kept[1] or '', '.made', kept[2] or '',
            '.changed', kept[3] or '', '.earlier', 1)
        producers = 1
    end
end
call('HSET', known, producer, ARGV[2] .. last, '.last', last, '.producers', producers,
    '.added', (before[2] or 0) + count, '.length', (before[3] or 0) + count,
    '.bytes', (before[4] or 0) + ARGV[3], '.largest', math.max(before[5] or 0, ARGV[4]))
return last
