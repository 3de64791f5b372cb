-- The first part of a transaction that pushes (begin.lua). KEYS: the stream, what is known of it.
redis.call('HSET', KEYS[2], '.marked', redis.call('XLEN', KEYS[1]))
