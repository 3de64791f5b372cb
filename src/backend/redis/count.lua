-- The words of `.count` (known.lua); zeros for what makes no sense.
local function counted(text)
    local pattern = '^(%d+) (-?%d+) (-?%d+) (-?%d+) (%d+) (%S*)$'
    local added, length, bytes, largest, producers, last = (text or ''):match(pattern)
    if not added then
        return '0', '0', '0', '0', '0', ''
    end
    return added, length, bytes, largest, producers, last
end

local function packed(added, length, bytes, largest, producers, last)
    return string.format('%d %d %d %d %d %s', added, length, bytes, largest, producers, last)
end
