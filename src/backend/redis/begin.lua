-- Looks whether a push is to be stored by a transaction. Half as much work as a script's are plain XADDs in one, but those
-- have no condition: so this comes before it, and the client sends the messages once this has said so. KEYS: the stream,
-- what is known of it, earlier producers. ARGV: the producer, the push's number in 20 digits. Returns the push's last id if
-- it was stored, else nothing.
--
-- The client watches two keys meanwhile, so that the transaction is not run if somebody touches them: the pipe's gate, who
-- removes it; the producer's claim, who repeats the push, or pushes the next one, without knowing what became of it.

-- Rights may be taken away at any time. MULTI comes right behind this, and nobody hears if it is refused: what should have
-- waited for EXEC would be done at once, one by one.
if not (redis.acl_check_cmd('MULTI') and redis.acl_check_cmd('EXEC')) then
    return redis.error_reply('NOPERM no transactions')
end
-- Nor would what is stored be noted; the script of other pushes says so.
if not redis.acl_check_cmd('HSET', KEYS[2], '.count', '') then
    return redis.error_reply('NOPERM no HSET')
end
local stream, known = KEYS[1], KEYS[2]
local before = before_push(known, ARGV[1])
local known_id = stored(before, KEYS[3], ARGV[1], ARGV[2])
if known_id then
    return known_id
end
-- Fails for a key of another type.
if redis.call('XLEN', stream) == 0 and redis.call('EXISTS', stream) == 0 then
    local _, _, _, _, producers, last = counted(before[2])
    make(stream, known, producers, last)
elseif before[4] == '' then
    redis.call('PERSIST', known)
end
return ''
