"""What people see: tables, progress, logs and figures."""

import logging

# that it has looked for fonts, the first time, is nobody's concern
logging.getLogger("matplotlib").setLevel(logging.WARNING)
