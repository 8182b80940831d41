import asyncio
async def f(): raise ValueError("lost")
async def main():
    t = asyncio.create_task(f()); await asyncio.sleep(0); del t
asyncio.run(main())
