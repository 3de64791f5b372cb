-- What is known of a stream without reading it. The hash `meta` keeps what this program counted when it last
-- pushed or reset: `length` and `last` say for which state of the stream that holds, since others write to it
-- too. `length` is -1 where the count was lost.

local COUNTABLE = 1000

-- The bytes of all messages and the longest one's, or -1 and -1 where it takes too long to tell.
local function count(stream, length, counted)
    if length == 0 then
        return 0, 0
    end
    if counted[1] and tonumber(counted[1]) == length and counted[2]
        and #redis.call('XRANGE', stream, '(' .. counted[2], '+', 'COUNT', 1) == 0 then
        return tonumber(counted[3]), tonumber(counted[4])
    end
    if length > COUNTABLE then
        return -1, -1
    end
    local bytes, largest = 0, 0
    for _, entry in ipairs(redis.call('XRANGE', stream, '-', '+')) do
        local fields, size = entry[2], 0
        for at = 1, #fields do
            size = size + #fields[at]
        end
        -- One field is the message; several are shown with their names, and some punctuation.
        if #fields == 2 then
            size = #fields[2]
        else
            return -1, -1
        end
        bytes, largest = bytes + size, math.max(largest, size)
    end
    return bytes, largest
end

local function counted(meta)
    return redis.call('HMGET', meta, 'length', 'last', 'bytes', 'largest')
end

local function info(stream)
    local fields, found = redis.call('XINFO', 'STREAM', stream), {}
    for at = 1, #fields, 2 do
        found[fields[at]] = fields[at + 1]
    end
    return found
end

local function now()
    local time = redis.call('TIME')
    return time[1] .. string.format('%06d', time[2])
end

-- Makes the stream, which does not exist, empty; its numbers go on behind `last`.
local function make(stream, meta, last)
    redis.call('XGROUP', 'CREATE', stream, 'dnpipes', '$', 'MKSTREAM')
    redis.call('XGROUP', 'DESTROY', stream, 'dnpipes')
    if last then
        redis.call('XSETID', stream, last)
    end
    redis.call('PERSIST', meta)
    redis.call('HSET', meta, 'made', now(), 'modified', now(), 'length', 0, 'bytes', 0, 'largest', 0)
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
