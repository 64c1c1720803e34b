import sys

from r1pipe import put_working_folder_last

put_working_folder_last()

from r1pipe.cli.main import main  # noqa: E402

sys.exit(main())
