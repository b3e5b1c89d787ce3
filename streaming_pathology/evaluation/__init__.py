"From predictions to metrics, heatmaps and a report."
