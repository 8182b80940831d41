import asyncio
async def f(n):
    await asyncio.sleep(0)
    if n: raise ValueError(n)
async def main():
    try:
        async with asyncio.TaskGroup() as g:
            for n in range(3): g.create_task(f(n))
    except* ValueError as group: print(sorted(str(e) for e in group.exceptions))
asyncio.run(main())
