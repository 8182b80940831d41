class Bad extends Error {}
throw new Bad("own");
