-- What is remembered of pushes: the last one of each producer. Once there are PRODUCERS of them, they become the earlier
-- ones; together those are the last 65,536 producers at least.

local PRODUCERS = 65536

-- Four words: the producer's last push, `.count`, whether there are earlier producers, `.made`.
local function before_push(known, producer)
    return redis.call('HMGET', known, producer, '.count', '.earlier', '.made')
end

-- The last id of push `number`, if it was stored.
local function stored(before, earlier, producer, number)
    local last = before[1] or before[3] and redis.call('HGET', earlier, producer)
    return last and last:sub(1, 20) >= number and last:sub(21)
end

-- Notes that push `number` ended with `id`, and the words of `.count`.
local function remember(before, known, earlier, producer, number, id, added, length, bytes, largest, producers)
    if not before[1] then
        producers = producers + 1
        if producers > PRODUCERS then
            -- What is known goes along, and comes back.
            local kept = redis.call('HMGET', known, '.floor', '.made', '.changed')
            redis.call('UNLINK', earlier)
            redis.call('RENAME', known, earlier)
            redis.call('HSET', known, '.floor', kept[1] or '', '.made', kept[2] or '',
                '.changed', kept[3] or '', '.earlier', 1)
            producers = 1
        end
    end
    redis.call('HSET', known, producer, number .. id, '.count', packed(
        added, length, bytes, largest, producers, id))
end
