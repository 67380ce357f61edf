package com.google.cloud.pubsub.testing.v1;

import java.lang.reflect.Field;
import java.lang.reflect.InvocationTargetException;
import java.lang.reflect.Method;
import java.util.Collection;
import java.util.HashSet;
import java.util.Map;
import java.util.Set;

/**
 * The cure for the Pub/Sub emulator's leases that never end.
 *
 * <p>A periodic task of the emulator (0.8.20) gives back the deliveries whose time to be retried has
 * come. It has a list of their ack ids by that time. An ack id stays in the list when the delivery is
 * acked after all, and is in it more than once when two were to be retried in the same millisecond. At
 * its turn the delivery is gone: a NullPointerException ({@code nackMessage}: "info" is null), and a
 * periodic task that threw is never run again. From then on the subscription never redelivers what a
 * dead or disconnected consumer held.
 *
 * <p>This inner class, put in front of the jar, stands in for the jar's own: it takes such ack ids out
 * of the list before it calls the jar's method. Of this file only the inner class is used; the outer
 * one is a stand-in to compile against.
 */
class MessageBacklog {
  class ExpireOutstandingMessagesRunnable implements Runnable {
    @Override
    public void run() {
      // The lock that every method of the backlog takes.
      synchronized (MessageBacklog.this) {
        try {
          forgetTheGone();
          expire();
        } catch (InvocationTargetException failed) {
          System.err.println("pubsub-emulator: no lease was ended this time: " + failed.getCause());
        } catch (ReflectiveOperationException other) {
          throw new IllegalStateException("this emulator is not the one the cure was made for", other);
        }
      }
    }

    private void expire() throws ReflectiveOperationException {
      Method expire = MessageBacklog.class.getDeclaredMethod("expireOutstandingMessages");
      expire.setAccessible(true);
      expire.invoke(MessageBacklog.this);
    }

    private void forgetTheGone() throws ReflectiveOperationException {
      Map<?, ?> delivered = (Map<?, ?>) field("delivered");
      Set<Object> seen = new HashSet<>();
      for (Object waiting : ((Map<?, ?>) field("delayedMessagesByTime")).values()) {
        ((Collection<?>) waiting).removeIf(id -> !delivered.containsKey(id) || !seen.add(id));
      }
    }

    private Object field(String name) throws ReflectiveOperationException {
      Field field = MessageBacklog.class.getDeclaredField(name);
      field.setAccessible(true);
      return field.get(MessageBacklog.this);
    }
  }
}
