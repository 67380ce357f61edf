package io.grpc;

/**
 * The cure for the Pub/Sub emulator's ghost streams.
 *
 * <p>The emulator's jar (0.8.20) mixes two versions of gRPC. When a client cancels a stream, the
 * newer half calls {@code InternalStatus.asRuntimeException(Status, Metadata, boolean)}, which the
 * older half does not have: NoSuchMethodError, the stream is never cleaned up, and it goes on
 * taking messages for a client that is gone. This class, put in front of the jar, has the method
 * that is called and the members that the jar's own class has.
 */
public final class InternalStatus {
  public static final Metadata.Key<String> MESSAGE_KEY = Status.MESSAGE_KEY;
  public static final Metadata.Key<Status> CODE_KEY = Status.CODE_KEY;

  private InternalStatus() {}

  public static StatusRuntimeException asRuntimeExceptionWithoutStacktrace(
      Status status, Metadata trailers) {
    return new StatusRuntimeException(status, trailers);
  }

  public static StatusRuntimeException asRuntimeException(
      Status status, Metadata trailers, boolean fillInStackTrace) {
    return new StatusRuntimeException(status, trailers);
  }
}
