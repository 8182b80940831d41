console.log(process.stdin.isTTY, process.stdout.isTTY, process.stderr.isTTY, process.stdout.columns);
process.stderr.write("err\n");
process.stdout.write("no newline");
