"""The engine: requests, block pool, scheduler, model runner, sampler, and the thread that steps them."""
