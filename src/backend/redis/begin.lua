-- Looks whether a push is to be stored by a transaction. Half as much work as a script's are plain XADDs in one, but those
-- have no condition: so this comes before it, and the client sends the messages once this has said so. KEYS: the stream,
-- what is known of it, earlier producers. ARGV: the producer, the push's number in 20 digits, `ahead` if there is no such
-- push yet: no pipe is made for it. Returns the push's last id if it was stored, `gone` if there is no pipe, else an empty
-- text.
--
-- The client watches two keys meanwhile, so that the transaction is not run if somebody touches them: the pipe's gate, who
-- removes it; the producer's claim, who repeats the push, or pushes the next one, without knowing what became of it. Other
-- programs touch neither: a stream that one of them deletes meanwhile is made again by the XADDs, and is not counted.

local stream, known, earlier = KEYS[1], KEYS[2], KEYS[3]
-- MULTI comes right behind this, and nobody hears if it is refused: what should have waited for EXEC would be done at once,
-- one by one.
demand('MULTI')
demand('EXEC')
-- Nor would what is stored be noted, if the last part failed (end.lua). Others may come between, so that it needs what this
-- one would not.
demand('XREVRANGE', stream, '+', '-', 'COUNT', 1)
demand('HGET', known, '.marked')
demand('HSET', known, '.count', '')
demand('UNLINK', earlier)
demand('RENAME', known, earlier)
local before = before_push(known, ARGV[1])
local known_id = stored(before, earlier, ARGV[1], ARGV[2])
if known_id then
    return known_id
end
-- Fails for a key of another type.
if redis.call('XLEN', stream) == 0 and redis.call('EXISTS', stream) == 0 then
    if ARGV[3] == 'ahead' then
        return 'gone'
    end
    local _, _, _, _, producers, last = counted(before[2])
    make(stream, known, producers, last)
elseif before[4] == '' then
    redis.call('PERSIST', known)
end
return ''
