-- Appends messages, unless this push was stored before. KEYS: the stream, what is known of it, earlier producers or the
-- second one again, and the claim of the producer's transactions (begin.lua) if none of them may be stored behind this push,
-- else the second one again. ARGV: the producer, its number in 20 digits, the sum of the messages' bytes, the longest one's,
-- the messages. Returns the id of the push's last message, or an empty text where it has to know the earlier producers.

local stream, known, earlier, producer = KEYS[1], KEYS[2], KEYS[3], ARGV[1]
-- What is stored without a note of it would be stored again.
demand('HSET', known, '.count', '')
if KEYS[4] ~= known then
    touch(KEYS[4])
end
local before = before_push(known, producer)
local added, length, bytes, largest, producers, last = counted(before[2])
local is_full = not before[1] and producers + 0 >= PRODUCERS
if earlier == known and not before[1] and (before[3] or is_full) then
    return ''
end
local known_id = stored(before, earlier, producer, ARGV[2])
if known_id then
    return known_id
end
if is_full then
    demand('UNLINK', earlier)
    demand('RENAME', known, earlier)
end
if before[4] == '' then
    demand('PERSIST', known)
end

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
remember(before, known, earlier, producer, ARGV[2], id,
    added + count, length + count, bytes + ARGV[3], math.max(largest, ARGV[4]), producers)
return id
