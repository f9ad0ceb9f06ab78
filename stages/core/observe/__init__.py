"""What watches a stage and cannot change its result; an edit here reruns nothing."""
