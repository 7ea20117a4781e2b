// Which regions are for one task (or class): the one they are most attributed to where `ablate-rois` measured that, else most active in.
// $task: string  a task's name
// $min_size: int = 2
// $limit: int = 20
MATCH (b:Block)
WHERE b.chosen AND b.size >= $min_size AND coalesce(b.attributed_task, b.task) = $task
RETURN b.key AS block, b.site AS site, b.size AS size, b.label AS label, b.attributed_share AS attributed_share, b.task_share AS task_share,
       b.task_entropy AS task_entropy, b.distinctive_task AS most_apart, b.distinctive_lift AS apart_by
ORDER BY coalesce(attributed_share, task_share) DESC, block
LIMIT $limit
