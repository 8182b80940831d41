import asyncio
async def f(): raise ValueError("inside")
asyncio.run(f())
