-- What comes before and behind the plain XADDs of a transaction that pushes, which take the server half as long as a
-- script's. KEYS: the stream, what is known of it, earlier producers. ARGV: the producer, the push's number in 20 digits,
-- and behind them how many messages there are, the sum of their bytes, the longest one's.
--
-- The client watches two keys meanwhile, so that the transaction is not run if somebody touches them: the pipe's gate, who
-- removes it; the producer's claim, who repeats the push, or pushes the next one, without knowing what became of it.

local stream, known, earlier = KEYS[1], KEYS[2], KEYS[3]
local producer, number, count = ARGV[1], ARGV[2], tonumber(ARGV[3])
local before = before_push(known, producer)
local added, length, bytes, largest, producers, last = counted(before[2])

if not count then
    -- Before the transaction, so that it may be left away. Returns the push's last id if it was stored, else nothing.
    local known_id = stored(before, earlier, producer, number)
    -- Fails for a key of another type.
    if not known_id and redis.call('XLEN', stream) == 0 and redis.call('EXISTS', stream) == 0 then
        make(stream, known, producers, last)
    elseif before[4] == '' then
        redis.call('PERSIST', known)
    end
    return known_id or ''
end

-- The last part of the transaction. Returns the id of the push's last message.
local found, marked = info(stream), redis.call('HGET', known, '.marked')
local came = found.length - marked
if came ~= count then
    -- Nobody comes between; why an XADD failed was not answered.
    return redis.error_reply('ERR ' .. came .. ' of ' .. count .. ' messages are stored')
end
local id = found['last-generated-id']
remember(before, known, earlier, producer, number, id,
    added + count, length + count, bytes + ARGV[4], math.max(largest, ARGV[5]), producers)
return id
