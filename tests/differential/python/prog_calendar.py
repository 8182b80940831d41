import calendar
calendar.prmonth(2024, 2)
