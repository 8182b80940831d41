// differential: {"stdin": "1\n2\n3\n"}
(async () => {
  let total = 0;
  for await (const chunk of process.stdin) total += chunk.toString().split("\n").reduce((a, b) => a + Number(b), 0);
  console.log(total);
})();
