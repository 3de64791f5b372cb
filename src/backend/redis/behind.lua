-- Ids, and the next ones.

-- The greatest number that an id has.
local MOST = '18446744073709551615'

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
