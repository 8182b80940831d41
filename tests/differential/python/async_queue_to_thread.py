import asyncio
async def main():
    q = asyncio.Queue(2)
    async def produce():
        for i in range(5): await q.put(i)
        await q.put(None)
    t = asyncio.create_task(produce())
    while (x := await q.get()) is not None: print(x, end=" ")
    print(await asyncio.to_thread(sum, [1, 2]))
asyncio.run(main())
