-- Appends messages, unless this push was stored before. KEYS: the stream, what is known of it, earlier producers.
-- ARGV: the producer, its number in 20 digits, the sum of the messages' bytes, the longest one's, the messages.
-- Returns the id of the push's last message.
--
-- The last push of each producer is remembered; once there are PRODUCERS of them, they become the earlier ones.
-- Together those are the last 65,536 producers at least.

local PRODUCERS = 65536

local stream, known, earlier, producer = KEYS[1], KEYS[2], KEYS[3], ARGV[1]
local before = redis.call('HMGET', known, producer, '.count', '.earlier', '.made')
local stored = before[1] or before[3] and redis.call('HGET', earlier, producer)
if stored and stored:sub(1, 20) >= ARGV[2] then
    return stored:sub(21)
end

local added, length, bytes, largest, producers, last = counted(before[2])
local call, count = redis.call, #ARGV - 4
local id = call('XADD', stream, 'NOMKSTREAM', '*', 'data', ARGV[5])
if not id then
    make(stream, known, producers, last)
    added, length, bytes, largest = 0, 0, 0, 0
    id = call('XADD', stream, '*', 'data', ARGV[5])
end
if before[4] == '' then
    -- What is known of a removed pipe goes after a day; not so of one that another program made again.
    call('PERSIST', known)
end
for at = 6, #ARGV do
    id = call('XADD', stream, '*', 'data', ARGV[at])
end

if not before[1] then
    producers = producers + 1
    if producers > PRODUCERS then
        -- What is known goes along, and comes back.
        local kept = call('HMGET', known, '.floor', '.made', '.changed')
        call('UNLINK', earlier)
        call('RENAME', known, earlier)
        call('HSET', known, '.floor', kept[1] or '', '.made', kept[2] or '',
            '.changed', kept[3] or '', '.earlier', 1)
        producers = 1
    end
end
call('HSET', known, producer, ARGV[2] .. id, '.count', packed(
    added + count, length + count, bytes + ARGV[3], math.max(largest, ARGV[4]), producers, id))
return id
