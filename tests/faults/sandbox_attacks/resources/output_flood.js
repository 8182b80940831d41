// Writes for ever without ever letting go of the event loop.
const fs = require("fs");
for (;;) fs.writeSync(1, "x".repeat(4096));
