# Values that tests/evaluation/test_reference.py holds the package against, by R.
#
#     cd tests/evaluation/r && Rscript reference.R > reference.csv
#
# Debian: r-base-core, r-cran-survival, r-cran-proc. The tables of slides beside this file are
# simulated; slides.py wrote them.

suppressMessages({
  library(survival)
  library(pROC)
})

say <- function(name, value) cat(sprintf("%s,%.15g\n", name, value))
cat("name,value\n")
cat(sprintf("# R %s,\n", getRversion()))
cat(sprintf("# survival %s,\n", packageVersion("survival")))
cat(sprintf("# pROC %s,\n", packageVersion("pROC")))

# ---- survival: one row a patient, that of the slide with the highest log risk

slides <- read.csv("survival.csv")
slides <- slides[order(slides$patient_id, -slides$log_risk), ]
patients <- slides[!duplicated(slides$patient_id), ]
threshold <- median(patients$log_risk)
patients$high <- patients$log_risk > threshold
test <- survdiff(Surv(months, event) ~ high, data = patients)
say("survival patients", nrow(patients))
say("survival events", sum(patients$event))
say("survival threshold", threshold)
say("survival high", sum(patients$high))
say("survival p", pchisq(test$chisq, 1, lower.tail = FALSE))

curve <- survfit(Surv(months, event) ~ 1, data = patients[patients$high, ], conf.type = "log-log")
at <- summary(curve, times = c(6, 12, 24))
for (i in 1:3) {
  say(sprintf("survival high at %g", at$time[i]), at$surv[i])
  say(sprintf("survival high low at %g", at$time[i]), at$lower[i])
  say(sprintf("survival high high at %g", at$time[i]), at$upper[i])
}

# what it was when every slide was taken for a patient
slides$high <- slides$log_risk > median(slides$log_risk)
of_slides <- survdiff(Surv(months, event) ~ high, data = slides)
say("survival p of slides", pchisq(of_slides$chisq, 1, lower.tail = FALSE))

# ---- intervals of an AUC

z <- qnorm(.975)
on_logit <- function(area, error) {
  plogis(qlogis(area) + c(-z, z) * error / (area * (1 - area)))
}
both <- function(name, limits) {
  say(paste(name, "low"), limits[1])
  say(paste(name, "high"), limits[2])
}

# Newcombe 2006, Statistics in Medicine 25, method 5
newcombe <- function(area, m, n) {
  excess <- function(x) {
    spread <- 1 + ((m + n) / 2 - 1) * ((1 - x) / (2 - x) + x / (1 + x))
    abs(area - x) - z * sqrt(x * (1 - x) * spread / (m * n))
  }
  limit <- function(from, to) uniroot(excess, c(from, to), tol = 1e-14)$root
  c(
    if (area > 0) limit(1e-12, area - 1e-12) else 0,
    if (area < 1) limit(area + 1e-12, 1 - 1e-12) else 1
  )
}

# Obuchowski 1997, Biometrics 53: slides clustered in patients
obuchowski <- function(slides) {
  x <- slides$score[slides$label == 1]
  y <- slides$score[slides$label == 0]
  psi <- outer(x, y, function(a, b) (a > b) + (a == b) / 2)
  area <- mean(psi)
  patients <- unique(slides$patient_id)
  sums <- function(placements, label) {
    of <- slides$patient_id[slides$label == label]
    sapply(patients, function(patient) sum(placements[of == patient] - area))
  }
  v10 <- sums(rowMeans(psi), 1)
  v01 <- sums(colMeans(psi), 0)
  i10 <- length(unique(slides$patient_id[slides$label == 1]))
  i01 <- length(unique(slides$patient_id[slides$label == 0]))
  m <- length(x)
  n <- length(y)
  i <- length(patients)
  s10 <- i10 / ((i10 - 1) * m) * sum(v10^2)
  s01 <- i01 / ((i01 - 1) * n) * sum(v01^2)
  s11 <- i / (i - 1) * sum(v10 * v01)
  list(area = area, error = sqrt(s10 / m + s01 / n + 2 * s11 / (m * n)))
}

slides <- read.csv("aucs.csv")
plain <- slides[slides$set == "plain", ]
curve <- roc(plain$label, plain$score, direction = "<", quiet = TRUE)
say("plain auc", as.numeric(auc(curve)))
both("plain", on_logit(as.numeric(auc(curve)), sqrt(var(curve))))
both("plain delong", as.numeric(ci.auc(curve))[c(1, 3)])

clustered <- slides[slides$set == "clustered", ]
found <- obuchowski(clustered)
say("clustered auc", found$area)
both("clustered", on_logit(found$area, found$error))
both("clustered delong", found$area + c(-z, z) * found$error)

for (name in c("separated", "one positive", "swapped")) {
  of_set <- slides[slides$set == name, ]
  curve <- roc(of_set$label, of_set$score, direction = "<", quiet = TRUE)
  area <- as.numeric(auc(curve))
  say(paste(name, "auc"), area)
  limits <- newcombe(area, sum(of_set$label == 1), sum(of_set$label == 0))
  if (name == "swapped") limits <- on_logit(area, sqrt(var(curve)))
  both(name, limits)
}

# ---- classes without an order

slides <- read.csv("classes.csv")
shares <- as.matrix(slides[, c("probability_0", "probability_1", "probability_2", "probability_3")])
called <- max.col(shares, ties.method = "first") - 1

one_against_rest <- function(label, share) {
  as.numeric(auc(roc(label, share, direction = "<", quiet = TRUE)))
}
macro <- function(labels, shares) {
  mean(sapply(unique(labels), function(k) one_against_rest(labels == k, shares[, k + 1])))
}
kappa <- function(labels, called, cost) {
  counts <- table(factor(labels, 0:3), factor(called, 0:3))
  costs <- outer(0:3, 0:3, cost)
  chance <- outer(rowSums(counts), colSums(counts)) / sum(counts)
  1 - sum(counts * costs) / sum(chance * costs)
}
unweighted <- function(i, j) as.numeric(i != j)
quadratic <- function(i, j) (i - j)^2
renumbered <- c(2, 0, 1, 3)

say("classes macro auc", macro(slides$diagnosis, shares))
say("classes kappa", kappa(slides$diagnosis, called, unweighted))
say("classes quadratic kappa", kappa(slides$diagnosis, called, quadratic))
say(
  "classes quadratic kappa renumbered",
  kappa(renumbered[slides$diagnosis + 1], renumbered[called + 1], quadratic)
)

set.seed(1)
draws <- 4000
resampled <- replicate(draws, {
  drawn <- sample(nrow(slides), replace = TRUE)
  c(
    macro(slides$diagnosis[drawn], shares[drawn, ]),
    kappa(slides$diagnosis[drawn], called[drawn], unweighted)
  )
})
both("classes macro auc", quantile(resampled[1, ], c(.025, .975)))
both("classes kappa", quantile(resampled[2, ], c(.025, .975)))
