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

-- As much as is looked at for a listing.
local MESSAGES, BYTES = 100, 1048576

-- The greatest number that an id has.
local MOST = '18446744073709551615'

local function now()
    local time = redis.call('TIME')
    return time[1] .. string.format('%06d', time[2])
end

local function info(stream)
    local fields, found = redis.call('XINFO', 'STREAM', stream), {}
    for at = 1, #fields, 2 do
        found[fields[at]] = fields[at + 1]
    end
    return found
end

-- The bytes of all messages and the longest one's, if there are few; -1 and -1 where it takes too long to tell.
local function count(stream, length)
    local bytes, largest, from = 0, 0, '-'
    if length > MESSAGES then
        return -1, -1
    end
    for _ = 1, length do
        local entry = redis.call('XRANGE', stream, from, '+', 'COUNT', 1)[1]
        -- One field is the message; several are shown with their names, and some punctuation.
        if #entry[2] ~= 2 then
            return -1, -1
        end
        bytes = bytes + #entry[2][2]
        largest = math.max(largest, #entry[2][2])
        if bytes > BYTES then
            return -1, -1
        end
        from = '(' .. entry[1]
    end
    return bytes, largest
end

-- Keeps the transactions that watch `key` from being run; nothing is left of it.
local function touch(key)
    redis.call('HSET', key, '', '')
    redis.call('UNLINK', key)
end

-- Makes the stream, which does not exist, empty; its numbers go on behind `last`.
local function make(stream, known, producers, last)
    redis.call('XGROUP', 'CREATE', stream, 'dnpipes', '$', 'MKSTREAM')
    redis.call('XGROUP', 'DESTROY', stream, 'dnpipes')
    if last ~= '' then
        redis.call('XSETID', stream, last)
    end
    local time = now()
    redis.call('PERSIST', known)
    redis.call('HSET', known, '.made', time, '.changed', time,
        '.count', packed(0, 0, 0, 0, producers, last))
end

-- A number of an id and one more. Numbers are doubles here, and those of ids need not be exact as such.
local function increment(digits)
    local head, digit, nines = digits:match('^(%d-)(%d?)(9*)$')
    return head .. (tonumber(digit) or 0) + 1 .. ('0'):rep(#nines)
end

-- The position behind `id`.
local function behind(id)
    local ms, seq = id:match('^(%d+)-(%d+)$')
    if seq == MOST then
        -- Behind the greatest id there is none.
        return ms == MOST and id or increment(ms) .. '-0'
    end
    return ms .. '-' .. increment(seq)
end
