-- Entries of a stream, as many as fit: where nobody knows how large they are, XRANGE alone could return more than
-- there is memory for. KEYS: the stream. ARGV: from, to, the bytes that are enough, how many to look at at a time.

local WEIGHT = 64

local enough, step = tonumber(ARGV[3]), tonumber(ARGV[4])
local found, from, bytes = {}, ARGV[1], 0
repeat
    local entries = redis.call('XRANGE', KEYS[1], from, ARGV[2], 'COUNT', step)
    for _, entry in ipairs(entries) do
        found[#found + 1] = entry
        bytes = bytes + WEIGHT
        for _, field in ipairs(entry[2]) do
            bytes = bytes + #field
        end
    end
    if #entries < step then
        break
    end
    from = '(' .. entries[#entries][1]
until bytes >= enough
return found
