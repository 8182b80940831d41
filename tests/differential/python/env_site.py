import site
print(site.ENABLE_USER_SITE, site.getuserbase())
