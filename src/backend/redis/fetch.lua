-- Entries of a stream, as many as fit: where nobody knows how large they are, XRANGE alone could return more than
-- there is memory for. KEYS: the stream. ARGV: from, to, the bytes that are enough, how many to look at at a time, and how
-- many are enough.

local WEIGHT = 64
local GREATEST = '18446744073709551615-18446744073709551615'

local enough, step, most = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
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
    local last = entries[#entries]
    -- Behind the greatest id nothing can be asked for.
    if #entries < step or last[1] == GREATEST then
        break
    end
    from = '(' .. last[1]
until bytes >= enough or #found >= most
return found
