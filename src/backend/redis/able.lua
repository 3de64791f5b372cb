-- Names a command without which nothing can be done, and that the server does not have; else it says nothing.
for _, command in ipairs({ 'EXISTS', 'HGET', 'HMGET', 'HSET', 'XADD', 'XINFO', 'XLEN', 'XRANGE' }) do
    if not pcall(redis.acl_check_cmd, command) then
        return command
    end
end
return ''
