import asyncio
async def main():
    async def serve(r, w): w.write((await r.readline()).upper()); await w.drain(); w.close()
    server = await asyncio.start_unix_server(serve, "s")
    r, w = await asyncio.open_unix_connection("s")
    w.write(b"hello\n"); print(await r.read()); server.close()
asyncio.run(main())
