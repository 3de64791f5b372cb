-- Removes a pipe, if it is still the one that the caller looked at. KEYS: the stream, what is known of it, earlier
-- producers, the gate of the transactions that push to it (begin.lua). ARGV: what told it from others, the channel that
-- tells of it. Returns where a pipe of that name will start, or nothing where there is none.

-- Seconds for which it is known where a pipe of that name has to go on, for the case that the clock is set back,
-- and which pushes were stored, for those that are still on their way.
local REMEMBERED = 86400

local stream, known, earlier = KEYS[1], KEYS[2], KEYS[3]
-- Fails for a key of another type.
redis.call('XLEN', stream)
if redis.call('EXISTS', stream) == 0 or (redis.call('HGET', known, '.made') or '') ~= ARGV[1] then
    return false
end
demand('UNLINK', stream, KEYS[4])
demand('HSET', KEYS[4], '', '')
demand('HSET', known, '.made', '')
demand('EXPIRE', known, REMEMBERED)
demand('EXPIRE', earlier, REMEMBERED)
local last = info(stream)['last-generated-id']
local floor = behind(last)
local _, _, _, _, producers = counted(redis.call('HGET', known, '.count'))
redis.call('UNLINK', stream)
-- Behind a change that a full memory does not forbid.
touch(KEYS[4])
-- One that another program makes of that name is not the one that was looked at, and so has no `.made`.
redis.call('HSET', known, '.made', '', '.floor', floor, '.count', packed(0, 0, 0, 0, producers, last))
redis.call('EXPIRE', known, REMEMBERED)
redis.call('EXPIRE', earlier, REMEMBERED)
redis.pcall('PUBLISH', ARGV[2], floor .. ' ' .. stream)
return floor
