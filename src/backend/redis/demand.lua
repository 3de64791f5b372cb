-- Rights may be taken away at any time, and a server need not have each command. What fails in its midst would be done by
-- halves: so what is needed behind a script's first change is asked for before that.
local function demand(...)
    local there, allowed = pcall(redis.acl_check_cmd, ...)
    if not there then
        error(redis.error_reply('ERR the server has no ' .. (...)))
    elseif not allowed then
        error(redis.error_reply('NOPERM no ' .. (...)))
    end
end
