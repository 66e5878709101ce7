"""Parts of the tasks that load torch; a task imports them inside its methods."""
