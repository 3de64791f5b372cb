-- The last part of a transaction that pushes (begin.lua). KEYS: the stream, what is known of it, earlier producers. ARGV: the
-- producer, the push's number in 20 digits, how many messages it has, the sum of their bytes, the longest one's. Returns
-- the id of the push's last message, or an empty text where none of them is stored.

local stream, known, earlier = KEYS[1], KEYS[2], KEYS[3]
local producer, number, count = ARGV[1], ARGV[2], tonumber(ARGV[3])
local came = redis.call('XLEN', stream) - redis.call('HGET', known, '.marked')
if came == 0 then
    return ''
end
if came ~= count then
    -- Nobody comes between; why an XADD failed was not answered.
    return redis.error_reply('ERR ' .. came .. ' of ' .. count .. ' messages are stored')
end
local before = before_push(known, producer)
local added, length, bytes, largest, producers = counted(before[2])
local id = redis.call('XREVRANGE', stream, '+', '-', 'COUNT', 1)[1][1]
remember(before, known, earlier, producer, number, id,
    added + count, length + count, bytes + ARGV[4], math.max(largest, ARGV[5]), producers)
return id
