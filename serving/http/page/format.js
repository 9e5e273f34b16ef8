/** Numbers as people read them. */

/** 0.981 as "98.1 %". */
export const percent = (share, digits = 1) => `${(100 * share).toFixed(digits)}\u00a0%`;

/** 1234 as "1,234". */
export const count = (number) => Number(number).toLocaleString("en");

/** "1 image" or "5 images". */
export const plural = (number, noun) => `${count(number)} ${noun}${Number(number) === 1 ? "" : "s"}`;

/** Nanoseconds as "0.12 ms". */
export const milliseconds = (nanoseconds) => `${(nanoseconds / 1e6).toFixed(2)}\u00a0ms`;

/** A difference of probabilities, with two digits that count. */
export const difference = (value) => (value ? Math.abs(value).toPrecision(2) : "0");

/** The same with its sign. */
export const signed = (value) => `${value > 0 ? "+" : value < 0 ? "\u2212" : ""}${difference(value)}`;

/** Seconds as "3 h 2 min". */
export function duration(seconds) {
  const minutes = Math.floor(seconds / 60);
  if (minutes < 1) return `${Math.floor(seconds)} s`;
  const hours = Math.floor(minutes / 60);
  if (hours < 1) return `${minutes} min`;
  return hours < 48 ? `${hours} h ${minutes % 60} min` : `${Math.floor(hours / 24)} d ${hours % 24} h`;
}
