import logging
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
logging.info("told")
logging.shutdown()
