// Takes memory outside the engine's own heap, which has a limit of its own.
const held = [];
for (;;) held.push(Buffer.alloc(1 << 20, 1));
