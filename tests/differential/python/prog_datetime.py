from datetime import *
from zoneinfo import ZoneInfo
t = datetime(2024, 3, 31, 1, 30, tzinfo=ZoneInfo("Europe/Berlin"))
print(t + timedelta(hours=1), t.astimezone(timezone.utc), date(2024, 1, 31).isocalendar(), datetime.strptime("5 May 2020", "%d %B %Y"), timedelta(days=-1, seconds=5))
