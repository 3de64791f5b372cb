-- Removes a pipe, if it is still the one that the caller looked at. KEYS: the stream, `meta`, `pushes`,
-- `pushes-old`. ARGV: what told it from others, the channel that tells of it. Returns where a pipe of that name
-- will start, or nothing where there is none.

-- Seconds for which it is known where a pipe of that name has to go on, for the case that the clock is set back,
-- and which pushes were stored, for those that are still on their way.
local REMEMBERED = 86400

local stream, meta, pushes, old = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
redis.call('XLEN', stream)
if redis.call('EXISTS', stream) == 0 or (redis.call('HGET', meta, 'made') or '') ~= ARGV[1] then
    return false
end
local last = info(stream)['last-generated-id']
local floor = behind(last)
redis.call('UNLINK', stream)
redis.call('HSET', meta, 'last', last, 'floor', floor)
for _, key in ipairs({ meta, pushes, old }) do
    redis.call('EXPIRE', key, REMEMBERED)
end
redis.pcall('PUBLISH', ARGV[2], floor .. ' ' .. stream)
return floor
