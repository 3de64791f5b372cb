-- Drops what was there when the caller looked: a reset that comes late, or twice, drops nothing else. KEYS: the
-- stream, what is known of it. ARGV: the last id there was, the channel that tells of it. Returns where the pipe
-- starts now, or nothing where there is no stream.

local PENDING = 1000

local stream, known, last = KEYS[1], KEYS[2], ARGV[1]
-- Fails for a key of another type.
redis.call('XLEN', stream)
if redis.call('EXISTS', stream) == 0 then
    return false
end
-- What groups have taken and not acknowledged is gone too; reading it again would find nothing.
local groups = redis.call('XINFO', 'GROUPS', stream)
if #groups > 0 then
    demand('XPENDING', stream, 'group', '-', '+', PENDING)
    demand('XACK', stream, 'group', '0-0')
end
demand('XRANGE', stream, '-', '+', 'COUNT', 1)
demand('XINFO', 'STREAM', stream)
demand('HSET', known, '.floor', '')
local _, _, _, _, producers = counted(redis.call('HGET', known, '.count'))
local time, floor = now(), behind(last)
if floor == last then
    -- The greatest id: nothing can come behind it.
    redis.call('XTRIM', stream, 'MAXLEN', 0)
else
    redis.call('XTRIM', stream, 'MINID', floor)
end
for _, group in ipairs(groups) do
    local name
    for at = 1, #group, 2 do
        if group[at] == 'name' then
            name = group[at + 1]
        end
    end
    local pending
    repeat
        pending = redis.call('XPENDING', stream, name, '-', last, PENDING)
        local ids = {}
        for at, entry in ipairs(pending) do
            ids[at] = entry[1]
        end
        if #ids > 0 then
            redis.call('XACK', stream, name, unpack(ids))
        end
    until #pending < PENDING
end
local length, found = redis.call('XLEN', stream), info(stream)
local bytes, largest = count(stream, length)
-- A length that it does not have says that nothing is counted.
local there = bytes < 0 and -1 or length
redis.call('HSET', known, '.floor', floor, '.changed', time, '.count', packed(
    found['entries-added'], there, bytes, largest, producers, found['last-generated-id']))
redis.pcall('PUBLISH', ARGV[2], floor .. ' ' .. stream)
return floor
