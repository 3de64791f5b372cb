-- What is known of a stream without reading it stands in a hash beside it:
--
--   .added .length   how many messages this program has counted since the stream was made, and how many of them
--                    are there; others write to the stream too, and then it has other numbers
--   .bytes .largest  the bytes of all messages, and of the longest one, while those numbers agree
--   .last .floor     the newest id, and where the pipe starts since the last reset
--   .made .changed   when it was made, and made or reset, in microseconds
--   .producers       how many producers are there, .earlier whether there are others
--   PRODUCER         the number of its last push, in 20 digits, and its last id
--
-- Producers are 16 bytes, and so are never mistaken for the rest.

-- As much as is looked at for a listing.
local MESSAGES, BYTES = 100, 1048576

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

-- Makes the stream, which does not exist, empty; its numbers go on behind `last`.
local function make(stream, known, last)
    redis.call('XGROUP', 'CREATE', stream, 'dnpipes', '$', 'MKSTREAM')
    redis.call('XGROUP', 'DESTROY', stream, 'dnpipes')
    if last then
        redis.call('XSETID', stream, last)
    end
    local time = now()
    redis.call('PERSIST', known)
    redis.call('HSET', known, '.made', time, '.changed', time,
        '.added', 0, '.length', 0, '.bytes', 0, '.largest', 0)
end

-- The position behind `id`.
local function behind(id)
    local ms, seq = id:match('^(%d+)-(%d+)$')
    -- Numbers are doubles here.
    if tonumber(seq) >= 2 ^ 53 then
        return string.format('%.0f-0', tonumber(ms) + 1)
    end
    return string.format('%s-%.0f', ms, tonumber(seq) + 1)
end
