-- What a stream itself tells.

-- As much as is looked at for a listing.
local MESSAGES, BYTES = 100, 1048576

local function info(stream)
    local fields, found = redis.call('XINFO', 'STREAM', stream), {}
    for at = 1, #fields, 2 do
        found[fields[at]] = fields[at + 1]
    end
    return found
end

-- The bytes of all messages and the longest one's, if there are few; -1 and -1 where it takes too long to tell.
local function count(stream, length)
    local bytes, largest, looked, from = 0, 0, 0, '-'
    if length > MESSAGES then
        return -1, -1
    end
    for _ = 1, length do
        local entry = redis.call('XRANGE', stream, from, '+', 'COUNT', 1)[1]
        -- One field is the message; several are shown with their names, and some punctuation.
        if #entry[2] ~= 2 then
            return -1, -1
        end
        local name, value = #entry[2][1], #entry[2][2]
        bytes = bytes + value
        largest = math.max(largest, value)
        -- Who fetches the message gets the name as well.
        looked = looked + name + value
        if looked > BYTES then
            return -1, -1
        end
        from = '(' .. entry[1]
    end
    return bytes, largest
end
