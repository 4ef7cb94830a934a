"""Problems with checkable answers, and how many of them a model solves."""
