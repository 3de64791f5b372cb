-- What is known of a stream without reading it stands in a hash beside it:
--
--   .count      six words: how many messages this program has counted since the stream was made, how many of them
--               are there (others write to the stream too, and then it has other numbers), their bytes and the longest
--               one's (while all that agrees), how many producers are there, and the newest id; one field, as each costs a
--               push some time
--   .floor      where the pipe starts since the last reset
--   .made       when it was made, and
--   .changed    made or reset, in microseconds
--   .earlier    whether there are earlier producers
--   .marked     the stream's length when the last large push began (mark.lua)
--   PRODUCER    the number of its last push, in 20 digits, and its last id
--
-- Producers are 16 bytes, and so are never mistaken for the rest.

local function now()
    local time = redis.call('TIME')
    return time[1] .. string.format('%06d', time[2])
end

-- Keeps the transactions that watch `key` from being run; nothing is left of it.
local function touch(key)
    demand('UNLINK', key)
    redis.call('HSET', key, '', '')
    redis.call('UNLINK', key)
end

-- Makes the stream, which does not exist, empty; its numbers go on behind `last`.
local function make(stream, known, producers, last)
    local time = now()
    demand('XGROUP', 'DESTROY', stream, 'dnpipes')
    demand('PERSIST', known)
    demand('HSET', known, '.made', time)
    if last ~= '' then
        demand('XSETID', stream, last)
    end
    redis.call('XGROUP', 'CREATE', stream, 'dnpipes', '$', 'MKSTREAM')
    redis.call('XGROUP', 'DESTROY', stream, 'dnpipes')
    if last ~= '' then
        redis.call('XSETID', stream, last)
    end
    redis.call('PERSIST', known)
    redis.call('HSET', known, '.made', time, '.changed', time,
        '.count', packed(0, 0, 0, 0, producers, last))
end
