/** Numbers as people read them. */

/** 0.981 as "98.1 %". */
export const percent = (share, digits = 1) => `${(100 * share).toFixed(digits)}\u00a0%`;

/** 1234 as "1,234". */
export const count = (number) => Number(number).toLocaleString("en");

/** "1 image" or "5 images". */
export const plural = (number, noun) => `${count(number)} ${noun}${Number(number) === 1 ? "" : "s"}`;

/** Nanoseconds as "0.12 ms". */
export const milliseconds = (nanoseconds) => `${(nanoseconds / 1e6).toFixed(2)}\u00a0ms`;

/** A difference of probabilities, 0 to 1, with two digits that count: as 0.031, or 2.0e-6 as a proof has it. */
export const difference = (value) => (value >= 1e-3 ? value.toPrecision(2) : value ? value.toExponential(1) : "0");

/** The same in percentage points, as "1.8 points"; below a thousandth of one nobody minds. */
export const points = (value) => `${countPoints(value)}\u00a0points`;

/** The same with its sign and without its unit, as "+1.8". */
export const signed = (value) => `${isTiny(value) ? "" : value > 0 ? "+" : "\u2212"}${countPoints(value)}`;

const isTiny = (value) => Math.abs(value) < 1e-5;

function countPoints(value) {
  const size = 100 * Math.abs(value);
  return isTiny(value) ? (size ? "below\u00a00.001" : "0") : size.toFixed(size < 0.1 ? 3 : size < 1 ? 2 : 1);
}

/** What computes, as "fp32 on CPU". */
export const variant = ({ precision, provider }) =>
  [precision, provider.replaceAll("ExecutionProvider", "")].filter(Boolean).join(" on ");

/** Seconds as "3 h 2 min". */
export function duration(seconds) {
  const minutes = Math.floor(seconds / 60);
  if (minutes < 1) return `${Math.floor(seconds)} s`;
  const hours = Math.floor(minutes / 60);
  if (hours < 1) return `${minutes} min`;
  return hours < 48 ? `${hours} h ${minutes % 60} min` : `${Math.floor(hours / 24)} d ${hours % 24} h`;
}
