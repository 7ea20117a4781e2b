// Which regions are for one task (or class): of all tasks their features are attributed to it most; the greatest share first.
// $task: string  a task's name
// $limit: int = 20
MATCH (b:Block)
WHERE b.task = $task AND b.chosen
RETURN b.key AS block, b.site AS site, b.size AS size, b.label AS label, b.task_share AS task_share, b.task_entropy AS task_entropy,
       b.distinctive_task AS most_apart, b.distinctive_lift AS apart_by
ORDER BY task_share DESC, block
LIMIT $limit
